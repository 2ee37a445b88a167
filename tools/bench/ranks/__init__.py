"""The program that each rank of `iobmd bench mpi` runs. Only it loads MPI, which the program must be started for."""
