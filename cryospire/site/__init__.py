"""What a run needs and what a machine has: resources of every stage, a site's settings, a check of a cluster."""
