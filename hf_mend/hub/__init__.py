"""Files on disk and on the Hub: safe reading and writing, transfer, cards."""
