"""Do the features of a sparse autoencoder carry?"""
