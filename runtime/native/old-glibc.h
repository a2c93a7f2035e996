// Makes libraries that are built on a new system load on older ones, from glibc 2.28 on. CMake includes this header in
// every source file.
#ifndef SPARSIFINER_OLD_GLIBC_H_
#define SPARSIFINER_OLD_GLIBC_H_

#include <features.h>

#ifdef __GLIBC__
// glibc 2.34 moved these functions from libpthread to libc under a new symbol version, without changing them. Link to
// the old version.
#if defined(__x86_64__)
#define SPARSIFINER_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define SPARSIFINER_FIRST_GLIBC "GLIBC_2.17"
#endif
#ifdef SPARSIFINER_FIRST_GLIBC
asm(".symver pthread_create,pthread_create@" SPARSIFINER_FIRST_GLIBC);
asm(".symver pthread_join,pthread_join@" SPARSIFINER_FIRST_GLIBC);
#endif

// Definitions of symbols that the compiler's headers take from a newer C++ library than that of systems with glibc 2.28
// (GLIBCXX_3.4.25). Only OpenVINO's extension uses the C++ library; the kernels do not.
#ifdef SPARSIFINER_OLD_CXX
// Declared before any header, so that they are hidden symbols of this library.
namespace std {
[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length();
__attribute__((visibility("hidden"))) void ios_base_library_init();
}  // namespace std
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;

#include <new>
#include <sstream>

char __libc_single_threaded = 0;  // Assume threads: reference counts stay atomic.
void std::__throw_bad_array_new_length() { throw bad_alloc(); }
void std::ios_base_library_init() {}  // Streams for input and output are not used.
template std::basic_ostringstream<char>::basic_ostringstream();
#endif
#endif

#endif  // SPARSIFINER_OLD_GLIBC_H_
