"""A FUSE file system of one file, for programs whose file's server does not answer (fuse(4), linux/fuse.h)."""

FILE_SYSTEM = """
import ctypes, os, struct
SIZE = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)

def attributes(inode):
    mode = 0o40755 if inode == 1 else 0o100644
    return struct.pack("<6Q10I", inode, SIZE, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

def answer(code, node, body):
    if code == 26:  # INIT
        return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 8, 8, 4096, 1, 1, 0, *[0] * 8)
    if code == 1:  # LOOKUP
        return struct.pack("<4Q2I", 2, 1, 0, 0, 0, 0) + attributes(2)
    if code == 3:  # GETATTR
        return struct.pack("<Q2I", 0, 0, 0) + attributes(node)
    if code == 14:  # OPEN
        return struct.pack("<Q2I", 1, 0, 0)
    if code == 15:  # READ
        offset, size = struct.unpack_from("<QI", body, 8)
        return bytes([7]) * max(0, min(size, SIZE - offset))
    if code == 17:  # STATFS
        return struct.pack("<5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
    return b"" if code in (18, 25) else None  # RELEASE, FLUSH

def serve(device):
    while True:
        request = os.read(device, 1 << 17)
        _length, code, unique, node = struct.unpack_from("<2I2Q", request)
        if code in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET
            continue
        body = answer(code, node, request[40:])
        error = -38 if body is None else 0
        os.write(device, struct.pack("<IiQ", 16 + len(body or b""), error, unique) + (body or b""))

def mount(folder):
    "In a separate mount namespace, which ends with the process."
    assert LIBC.unshare(0x20000) == 0 and LIBC.mount(b"none", b"/", None, 0x44000, None) == 0
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    assert LIBC.mount(b"test", folder.encode(), b"fuse", 6, options) == 0, ctypes.get_errno()
    return device

def served_file(folder):
    "Serve it in a child; return the child's pid and a descriptor of the file."
    device = mount(folder)
    server = os.fork()
    if not server:
        LIBC.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
        serve(device)
    os.close(device)
    return server, os.open(folder + "/file", os.O_RDWR)
"""
