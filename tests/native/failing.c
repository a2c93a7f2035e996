// Preloaded into a process, makes the n-th allocation that one library asks for fail. Everyone else's allocations succeed.
// For GNU's C library.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static atomic_long counted, failed, first;
static atomic_int armed, forever;

// Fail the n-th allocation from now on (0: none), and with `always` all later ones.
void failing_arm(long n, int always) {
  counted = failed = 0;
  first = n;
  forever = always;
  armed = 1;
}
void failing_disarm(void) { armed = 0; }
long failing_counted(void) { return counted; }
long failing_failed(void) { return failed; }

// Asked for by the function that returns to `caller`.
static int fails(void* caller) {
  struct dl_find_object found;  // dladdr looks for a symbol too, which takes long
  if (!armed || _dl_find_object(caller, &found)) return 0;
  if (!strstr(found.dlfo_link_map->l_name, "libsparsifiner_ops")) return 0;
  const long number = ++counted, from = first;
  if (from == 0 || number < from || (number > from && !forever)) return 0;
  ++failed;
  errno = ENOMEM;
  return 1;
}

#define FAILS fails(__builtin_return_address(0))

void* malloc(size_t size) { return FAILS ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return FAILS ? NULL : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return FAILS ? NULL : __libc_realloc(old, size); }
void* aligned_alloc(size_t alignment, size_t size) { return FAILS ? NULL : __libc_memalign(alignment, size); }
void* memalign(size_t alignment, size_t size) { return FAILS ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
  if (FAILS) return ENOMEM;
  *memory = __libc_memalign(alignment, size);
  return *memory ? 0 : ENOMEM;
}
