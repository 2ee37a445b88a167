"""DPDK: a memory zone that is contiguous for devices, on a NUMA node.

Before, after `dpdk-hugepages.py --setup 1G` and rte_eal_init():

    const struct rte_memzone *zone = rte_memzone_reserve("ring", 2 << 20, 0, RTE_MEMZONE_IOVA_CONTIG);
    write_to_device(zone->iova);
    write_to_device(rte_mem_virt2iova((char *)zone->addr + 4096));
    rte_memzone_free(zone);
"""

import iobmd

with iobmd.allocate(2 << 20, contiguous=True, node=0) as zone:
    address = zone.getPhysicalAddress()
    ring, length = zone.getPhysicalSegment(4096)
    assert ring == address + 4096
    assert length == (2 << 20) - 4096
    print(f"{len(zone) >> 20} MiB at {address:#x} of node 0")
