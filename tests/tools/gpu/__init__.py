"""What the GPU tests share: cases, the emulator of kernels on plain threads, the role players, the probes."""
