"""The parts of `iobmd demo`, and the process whose memory it copies."""
