// Functions of the driver that libraries of PyTorch and Triton want to find, and that nothing here should call. In a
// file of its own, since their arguments are left out.
extern "C" void dry_run_unrecorded(const char* name);

#define UNRECORDED(name)                                              \
  extern "C" __attribute__((visibility("default"))) int name() {      \
    dry_run_unrecorded(#name);                                        \
    return 801; /* not supported */                                   \
  }

UNRECORDED(cuLaunchCooperativeKernel)
UNRECORDED(cuLinkAddData_v2)
UNRECORDED(cuLinkComplete)
UNRECORDED(cuLinkCreate_v2)
UNRECORDED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNRECORDED(cuTensorMapEncodeIm2col)
