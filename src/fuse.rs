//! FUSE adapter: a request becomes a vfs call, its answer a reply.
