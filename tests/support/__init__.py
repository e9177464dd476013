"""What tests share beside fixtures: tiny models, a local Hub, oracles."""
