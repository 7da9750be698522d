"""Do other causal routers, or experts that talk, train the language model better?"""
