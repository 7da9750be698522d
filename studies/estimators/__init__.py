"""Do other gradient estimators train the language model better than the exact one?"""
