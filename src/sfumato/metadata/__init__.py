"""Image metadata: the text in image files, to requests and back."""
