"""What the tests share: other processes to look at, independent readers of the kernel's files, requirements."""
