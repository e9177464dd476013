"""From requests to edits: the pipeline of one call and the search for its updates."""
