"""What a step minimises: the flow, the distribution of t, the losses."""
