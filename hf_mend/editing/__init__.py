"""From a request to an edit: the pipeline of one call and the search for its updates."""
