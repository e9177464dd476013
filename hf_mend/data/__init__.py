"""Records, their encoding to token ids, and readers of the field's layouts."""
