// Which instruction set runs, and the words for what the kernels return.
#include <cstdlib>
#include <cstring>

#include "block_level.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(MICROGLIA_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define MG_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__x86_64__)
bool has_vnni() {
#if defined(MICROGLIA_AVX512VNNI)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_bf16() {
#if defined(MICROGLIA_AVX512BF16)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
#else
  return false;
#endif
}

// Tiles and their products in 8 bits, and Linux's permission to use the registers, which holds for the whole process.
bool has_amx() {
#if defined(MICROGLIA_AMX)
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool there = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 1) && (edx >> 25 & 1);
  return there && syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}
#endif

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512) return !has_vnni() ? MG_AVX512 : !has_bf16() ? MG_AVX512VNNI : has_amx() ? MG_AMX : MG_AVX512BF16;
  return avx2 ? MG_AVX2 : MG_GENERIC;
#else
  return MG_GENERIC;
#endif
}

int wanted_level() {
  const int best = best_level();
  const char* wanted = std::getenv("MICROGLIA_ISA");
  if (!wanted) return best;
  for (int level = MG_GENERIC; level <= best; ++level) {
    if (std::strcmp(wanted, mg_level_name(level)) == 0) return level;
  }
  return best;
}

}  // namespace

MG_EXPORT int mg_level(void) {
  static const int level = wanted_level();  // once in a process: what was reported is what runs
  return level;
}

MG_EXPORT const char* mg_level_name(int level) {
  switch (level) {
    case MG_GENERIC: return "generic";
    case MG_AVX2: return "avx2";
    case MG_AVX512: return "avx512";
    case MG_AVX512VNNI: return "avx512vnni";
    case MG_AVX512BF16: return "avx512bf16";
    case MG_AMX: return "amx";
    default: return "unknown";
  }
}

MG_EXPORT const char* mg_error_text(int code) {
  switch (code) {
    case MG_OK: return "no error";
    case MG_BAD_SIZE: return "a size, stride or dilation is below 1, a padding is below 0, or a product overflows";
    case MG_BAD_BLOCK: return "the block has a shape that the kernels do not know";
    case MG_BAD_ROW_POINTER: return "the row pointers do not start at 0, rise, and end at the number of blocks";
    case MG_BAD_CHANNEL: return "a block reads an input channel that the input does not have";
    case MG_BAD_TAP: return "a block reads a position outside the kernel";
    case MG_BAD_ACTIVATION: return "the activation is unknown";
    case MG_BAD_POINTER: return "a pointer is null where there must be data";
    case MG_NO_MEMORY: return "no memory for the kernels' working copy of the input";
    case MG_BAD_LIST: return "a list of channels or stripes does not strictly rise, or leaves its range";
    case MG_BAD_PAIR: return "a pair of bfloat16 input channels lies across a multiple of 32";
    case MG_BAD_QUAD: return "four 8-bit input channels lie across a multiple of 64";
    default: return "an unknown error";
  }
}
