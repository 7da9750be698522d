"""Which way of balancing brings a collapsed router back?"""
