"""For tests, ours and those of authors of engines: a contract suite and engines that misbehave."""
