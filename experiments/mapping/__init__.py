"""Do mapped states do in place of a model's own?"""
