"""Pictures that remember: the texts in picture files, to requests and back."""
