"""Side by side with what people use today; prints ratios. How to run and the last results: docs/benchmarks.md."""
