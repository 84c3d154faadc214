"""What tests share and that is no test itself: named problems, tolerances, formulas, a made-up CUDA driver, other engines."""
