"""Tuning: where and how hard to steer, by effect at a bounded cost, confirmed on held-out items."""
