"""What every benchmark shares: cases and baselines, interleaved times, results files and tables."""
