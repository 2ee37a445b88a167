"""A connection to another machine by RDMA."""
