"""Claim: loads, not additions, limit the blocks of 16 outputs x 1 input on some processors, and the limit is measured here.

A block multiplies 16 weights, which stay in registers, by one activation of each pixel. Each activation is loaded again for
each block. Three loops measure what one core reaches at best, with all data in the first cache: multiply-adds of registers
alone, with an activation from memory in each (a dense layer by the same kernel), and the same where the places of the
activations are read from a list, as for kept blocks. With AVX2 an activation serves two registers of weights.

The script compiles its loops with the system's C++ compiler (``CXX``). Best of the rounds, which other work on the machine
disturbs least. Last line: multiply-adds with listed activations / of registers alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import records
from microglia.core.timing import processor_name

SOURCE = r"""
#include <immintrin.h>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

#if WIDE
using Floats = __m512;
constexpr int pixels = 28, halves = 1, lanes = 16;
static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats spread(const float* p) { return _mm512_set1_ps(*p); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float first(Floats a) { return _mm512_cvtss_f32(a); }
#else
using Floats = __m256;
constexpr int pixels = 6, halves = 2, lanes = 8;
static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Floats spread(const float* p) { return _mm256_broadcast_ss(p); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline float first(Floats a) { return _mm256_cvtss_f32(a); }
#endif

constexpr int inputs = 64, passes = 2000;
alignas(64) static float activations[pixels * inputs], weights[inputs * 16];
static int32_t places[inputs + 1];
static float sink;

// As in the kernel: a line holds 16 channels of a pixel, a channel's pixels lie 64 bytes apart, and its address is read one
// place ahead and kept in a register. kind: 0 registers, 1 activations in order, 2 activations at listed places.
template <int kind>
static double rate() {
  double best = 0;
  for (int round = 0; round < 40; ++round) {
    Floats sum[pixels][halves] = {};
    const auto begun = std::chrono::steady_clock::now();
    for (int pass = 0; pass < passes; ++pass) {
      const Floats still = spread(activations);
      const float* next = activations + places[0];
      for (int k = 0; k < inputs; ++k) {
        const float* place = kind == 2 ? next : activations + k / 16 * pixels * 16 + k % 16;
        asm volatile("" : "+r"(place));
        next = activations + places[k + 1];
        Floats weight[halves];
        for (int half = 0; half < halves; ++half) weight[half] = load(weights + 16 * k + lanes * half);
#pragma GCC unroll 28
        for (int p = 0; p < pixels; ++p) {
          const Floats value = kind == 0 ? still : spread(place + p * 16);
#pragma GCC unroll 2
          for (int half = 0; half < halves; ++half) sum[p][half] = fma(value, weight[half], sum[p][half]);
        }
      }
      asm volatile("" ::: "memory");
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    for (auto& row : sum) for (auto& each : row) sink += first(each);
    best = std::max(best, 16.0 * pixels * inputs * passes / seconds);
  }
  return best / 1e9;
}

int main() {
  for (int k = 0; k < inputs; ++k) {
    const int channel = (k * 29) % inputs;
    places[k] = channel / 16 * pixels * 16 + channel % 16;
  }
  printf("%f %f %f\n", rate<0>(), rate<1>(), rate<2>());
}
"""
LEVELS = {"avx512f": ("AVX-512", ["-mavx512f", "-DWIDE=1"]), "avx2": ("AVX2", ["-mavx2", "-mfma", "-DWIDE=0"])}
"""Flag of the processor -> its name, and the compiler's options."""


def rates(options: list[str]) -> list[float]:
    """Returns billions of multiply-adds a second of the three loops."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("There is no C++ compiler: install one, or name it in CXX.")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "loops.cpp", Path(folder) / "loops"
        source.write_text(SOURCE)
        try:
            subprocess.run([compiler, "-O2", "-std=c++17", *options, "-o", program, source], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"The C++ compiler {compiler!r} does not compile the loops ({error}): name another in CXX."
            ) from None
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [float(word) for word in printed.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that speed_document.py reads")
    asked = parser.parse_args()
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set()
    found = {words: rates(options) for flag, (words, options) in LEVELS.items() if flag in flags}
    if not found:
        raise SystemExit("This processor has neither AVX-512 nor AVX2.")
    table = Table(title=f"Billions of multiply-adds a second, one core, {processor_name()}", title_justify="left")
    for heading in ("registers", "of registers alone", "activations in order", "listed activations", "share"):
        table.add_column(heading)
    for words, (alone, row, listed) in found.items():
        table.add_row(words, f"{alone:.1f}", f"{row:.1f}", f"{listed:.1f}", f"{100 * listed / alone:.0f} %")
    Console().print(table)
    records.write(asked.json, "ports", rates=found)
    alone, _, listed = next(iter(found.values()))
    print(f"ratio: {listed / alone:.2f}")


if __name__ == "__main__":
    main()
