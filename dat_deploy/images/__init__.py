"""Images: how they are read and preprocessed, what their classes are called, and the ways of getting it wrong."""
