// What makes a library that a new system built load on older ones, from glibc 2.28 on: CMake includes it everywhere.
#ifndef SPARSIFINER_OLD_GLIBC_H_
#define SPARSIFINER_OLD_GLIBC_H_

#include <features.h>

#ifdef __GLIBC__
// glibc 2.34 moved these from libpthread to libc, and gave them a new version with that alone.
#if defined(__x86_64__)
#define SPARSIFINER_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define SPARSIFINER_FIRST_GLIBC "GLIBC_2.17"
#endif
#ifdef SPARSIFINER_FIRST_GLIBC
asm(".symver pthread_create,pthread_create@" SPARSIFINER_FIRST_GLIBC);
asm(".symver pthread_join,pthread_join@" SPARSIFINER_FIRST_GLIBC);
#endif

// What the compiler's own headers use of a newer C++ library (GLIBCXX_3.4.25 came with glibc 2.28's systems), in OpenVINO's
// extension alone: the kernels use none.
#ifdef SPARSIFINER_OLD_CXX
// Before any header declares them: they are this library's own.
namespace std {
[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length();
__attribute__((visibility("hidden"))) void ios_base_library_init();
}  // namespace std
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;

#include <new>
#include <sstream>

char __libc_single_threaded = 0;  // Threads may be there: reference counts are atomic.
void std::__throw_bad_array_new_length() { throw bad_alloc(); }
void std::ios_base_library_init() {}  // Nothing here prints.
template std::basic_ostringstream<char>::basic_ostringstream();
#endif
#endif

#endif  // SPARSIFINER_OLD_GLIBC_H_
