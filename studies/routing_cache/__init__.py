"""When do the experts of earlier gate inputs serve later ones, and when does it save time?"""
