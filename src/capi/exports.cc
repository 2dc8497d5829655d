#include "sparkv/sparkv.h"

extern "C" const char* sparkv_version(void) { return SPARKV_VERSION; }
