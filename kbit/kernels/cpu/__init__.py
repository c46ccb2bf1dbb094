"""C++ kernels for the CPU behind a plain C interface: `build` compiles them, `library` finds and loads them."""
