"""What tests share and that is no test itself: named problems, tolerances,
formulas, a fake CUDA driver, other engines."""
