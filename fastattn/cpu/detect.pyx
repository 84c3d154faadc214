# cython: language_level=3, freethreading_compatible=True
# What this CPU can run: a module of its own, because it is asked before an instruction set is chosen.
cdef extern from "detect.h" nogil:
    ctypedef struct Feature:
        const char* name
    const Feature* FEATURES
    enum:
        NUM_FEATURES
    void read_features(int* usable)


def cpu_features():
    """Names of what this CPU can run and the system has enabled, as /proc/cpuinfo spells them. Empty unless x86-64."""
    cdef int usable[NUM_FEATURES]
    read_features(usable)
    return {FEATURES[n].name.decode() for n in range(NUM_FEATURES) if usable[n]}
