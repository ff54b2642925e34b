// Work shared over the threads of the libgomp that is already loaded (torch's, if torch is there).
//
// The core is not linked with libgomp: it is found at the first parallel step, so there is one pool
// in the process, torch.set_num_threads and OMP_NUM_THREADS are respected, the order of imports
// does not matter and nothing is needed at import. A second pool beside torch's was measured five
// times slower in a step after a torch operation, because torch's waiting threads own the cores.
#pragma once
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ebbtide {

// Flush magnitudes under 2^-126 to zero in this thread for as long as it lives; then restore.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

class Threads {
 public:
  static Threads& instance() {
    static Threads threads;
    return threads;
  }

  // How many threads a step of the calling thread would use.
  int count() {
    if (forced_ > 0) return forced_;
    if (serial_ || !load()) return 1;
    return std::max(1, std::min(max_threads_(), quota_));
  }
  void force(int count) { forced_ = count; }
  int quota() const { return quota_; }
  const char* runtime() {
    if (serial_) return "none: forked from a process with threads";
    return load() ? path_ : "none: libgomp not found";
  }

  // Calls body(thread, threads) on each of `count` threads.
  template <typename Body>
  void run(int count, const Body& body) {
    if (count <= 1 || serial_ || !load()) {
      const FlushDenormals flush;
      body(0, 1);
      return;
    }
    struct Call {
      const Body& body;
      Threads& threads;
    } call{body, *this};
    parallel_(
        [](void* data) {
          const Call& c = *static_cast<Call*>(data);
          const FlushDenormals flush;
          c.body(c.threads.thread_num_(), c.threads.num_threads_());
        },
        &call, unsigned(count), 0);
  }

 private:
  Threads() : quota_(cgroup_quota()) {
    pthread_atfork([] { instance().had_threads_ = thread_count() > 1; }, nullptr,
                   [] { instance().serial_ |= instance().had_threads_; });
  }

  bool load() {
    if (parallel_ != nullptr || tried_) return parallel_ != nullptr;
    tried_ = true;
    void* gomp = dlopen("libgomp.so.1", RTLD_NOW);
    if (gomp == nullptr) return false;
    max_threads_ = reinterpret_cast<int (*)()>(dlsym(gomp, "omp_get_max_threads"));
    thread_num_ = reinterpret_cast<int (*)()>(dlsym(gomp, "omp_get_thread_num"));
    num_threads_ = reinterpret_cast<int (*)()>(dlsym(gomp, "omp_get_num_threads"));
    void* parallel = dlsym(gomp, "GOMP_parallel");
    Dl_info info;
    if (dladdr(parallel, &info) != 0) path_ = info.dli_fname;
    parallel_ = reinterpret_cast<decltype(parallel_)>(parallel);
    return true;
  }

  // Threads of this process now. A child forked from a process with a thread pool inherits the pool
  // without its threads and would wait for them for ever: it steps serially.
  static int thread_count() {
    std::error_code error;
    int count = 0;
    for (auto it = std::filesystem::directory_iterator("/proc/self/task", error);
         !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
      ++count;
    }
    return count;
  }

  // Processors that the control group grants (cpu.max, version 2), rounded up.
  static int cgroup_quota() {
    int quota = 1 << 16;
    if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
      long microseconds = 0, period = 0;
      if (std::fscanf(file, "%ld %ld", &microseconds, &period) == 2 && period > 0) {
        quota = int((microseconds + period - 1) / period);
      }
      std::fclose(file);
    }
    return std::max(quota, 1);
  }

  void (*parallel_)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads_)() = nullptr;
  int (*thread_num_)() = nullptr;
  int (*num_threads_)() = nullptr;
  const char* path_ = "";
  int forced_ = 0;
  int quota_;
  bool tried_ = false;
  bool had_threads_ = false;
  bool serial_ = false;
};

}  // namespace ebbtide
