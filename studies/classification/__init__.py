"""Which experts serve a whole text, with routers that see all of it?"""
