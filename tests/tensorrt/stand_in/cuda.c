/* Stands in for the driver's library, as far as launches need it: a module is its text, a launch is told to the test. */

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void Launched(const char* symbol, const unsigned* sizes, void* stream, void** parameters);

static Launched* launched;
static int calls, failing = -1;

void stand_in_driver(Launched* each, int failing_call) {
  launched = each;
  calls = 0;
  failing = failing_call;
}

int stand_in_calls(void) { return calls; }

static int fails(void) { return calls++ == failing; }

int cuGetErrorName(int status, const char** name) {
  *name = status == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_INVALID_PTX";
  return 0;
}

int cuModuleLoadDataEx(void** module, const void* text, unsigned count, const int* options, void** values) {
  const int wrong = fails();
  for (unsigned i = 0; wrong && i < count; ++i) {
    if (options[i] == 5) snprintf(values[i], 64, "ptxas error\n  : line 1");
    if (i + 1 == count) return 218;
  }
  *module = strdup(text);
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* symbol) {
  char entry[256];
  snprintf(entry, sizeof(entry), ".entry %s(", symbol);
  if (fails() || strstr(module, entry) == NULL) return 1;
  *function = strdup(symbol);
  return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) { return fails() || function == NULL || attribute != 8 || value <= 49152; }

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const unsigned sizes[] = {x, y, z, threads, shared};
  if (fails() || threads_y != 1 || threads_z != 1 || extra != NULL) return 1;
  launched(function, sizes, stream, parameters);
  return 0;
}
