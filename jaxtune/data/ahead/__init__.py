"""Windows rendered, tokenised and packed ahead of training: by `prepare`, into a cache that training finds."""
