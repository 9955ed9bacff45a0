// A fixed team of threads with a barrier. Waiting spins for SPIN microseconds, then sleeps: two processes that
// share a machine's cores do not burn each other's time, as OpenMP's default (milliseconds of spinning, set by the
// environment for the whole process) would.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "layout.h"

namespace s2d {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A counter that threads wait on until it leaves a value.
class Event {
public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        value_.fetch_add(1);
        if (sleepers_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            awake_.notify_all();
        }
    }

    void wait(uint32_t old) {
        for (int i = 0; i < 64; ++i) {
            if (value() != old) return;
            relax();
        }
        const auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 32; ++i) {
                if (value() != old) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);  // before the check, as advance() counts after its change: none is missed
        while (value_.load() == old) awake_.wait(lock);
        sleepers_.fetch_sub(1);
    }

private:
    static constexpr std::chrono::microseconds SPIN{60};

    alignas(64) std::atomic<uint32_t> value_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable awake_;
};

class Pool {
public:
    // fn(context, thread, threads) runs once on every thread, 0 being the caller's.
    using Function = void (*)(void*, int, int);

    explicit Pool(int threads)
        : threads_(threads < 1 ? 1 : threads), owner_(getpid()), taken_(static_cast<size_t>(threads_)) {
        sigset_t all, before;  // signals stay with the threads of the interpreter
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int t = 1; t < threads_; ++t) workers_.emplace_back([this, t] { work(t); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            stop();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Pool() { stop(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    template <typename Body>
    void parallel(Body&& body) {
        using Plain = std::remove_reference_t<Body>;
        run([](void* context, int thread, int threads) { (*static_cast<Plain*>(context))(thread, threads); }, &body);
    }

    void run(Function fn, void* context) {
        std::lock_guard<std::mutex> one_caller(callers_);
        if (threads_ == 1 || owner_ != getpid()) {  // a forked child has no workers; the results are the same
            alone_ = true;
            fn(context, 0, 1);
            alone_ = false;
            return;
        }
        fn_ = fn;
        context_ = context;
        start_.advance();
        fn(context, 0, threads_);
        barrier();
    }

    // body(begin, end, again) for pieces of the parts 0..count-1 of a product, each on one thread: a thread works on its own share, then on
    // what is left of the others'. So who is interrupted keeps the team waiting for a piece, not for its share.
    // `again`: this thread has had a piece of them before. All threads call this, and meet before they do again.
    template <typename Body>
    void divide(int64_t count, int64_t rows, int64_t part_bytes, int thread, int threads, Body&& body) {
        const int64_t piece = piece_of(count, rows, part_bytes);
        Taken& own = taken_[static_cast<size_t>(thread)];
        const size_t now = own.turn++ % 2;
        own.count[1 - now].store(0, std::memory_order_relaxed);  // all have left the last division
        bool again = false;
        for (int i = 0; i < threads; ++i) {
            const int of = (thread + i) % threads;
            std::atomic<int64_t>& taken = taken_[static_cast<size_t>(of)].count[now];
            int64_t first, end;
            share(count, of, threads, first, end);
            while (first + taken.load(std::memory_order_relaxed) < end) {
                const int64_t begin = first + taken.fetch_add(piece, std::memory_order_relaxed);
                if (begin >= end) break;
                body(begin, std::min(begin + piece, end), again);
                again = true;
            }
        }
    }

    // All threads of the team meet. Only inside run().
    void barrier() {
        if (alone_) return;
        const uint32_t phase = phase_.value();
        if (arrived_.fetch_add(1) + 1 == threads_) {
            arrived_.store(0);
            phase_.advance();
        } else {
            phase_.wait(phase);
        }
    }

private:
    // What has been taken of a thread's share in this division; the other count is that of the next.
    struct alignas(64) Taken {
        std::atomic<int64_t> count[2]{};
        size_t turn = 0;
    };

    void work(int thread) {
        for (uint32_t seen = 0;;) {
            start_.wait(seen);
            seen = start_.value();
            if (stopping_.load()) return;
            fn_(context_, thread, threads_);
            barrier();
        }
    }

    void stop() {
        if (owner_ == getpid()) {
            stopping_.store(true);
            start_.advance();
            for (auto& worker : workers_) worker.join();
        } else {
            for (auto& worker : workers_) worker.detach();
        }
    }

    const int threads_;
    const pid_t owner_;
    bool alone_ = false;
    std::vector<Taken> taken_;
    std::vector<std::thread> workers_;
    std::mutex callers_;
    std::atomic<bool> stopping_{false};
    Function fn_ = nullptr;
    void* context_ = nullptr;
    Event start_, phase_;
    alignas(64) std::atomic<int> arrived_{0};
};

// One team a number of threads for all models and matrices of the process, as long as any uses it: a draft and its
// target take turns on the same cores, and a team that has just worked is still awake. A pool runs one caller at a time.
inline std::shared_ptr<Pool> shared_pool(int threads) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Pool>> pools;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Pool> pool = pools[threads].lock();
    if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
    return pool;
}

}  // namespace s2d
