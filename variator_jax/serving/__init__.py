"""Serving: the compiled engine, batches, the policy of ratios, HTTP, bulk encoding and export."""
