"""The objective of a step: the flow, the distribution of t, the losses."""
