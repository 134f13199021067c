// A warp on a CPU: every lane is a fiber with a stack of its own, and runs until the warp meets.
//
// A function that the lanes of a warp execute together hands the lane's value to the warp and lets the next lane run; when
// all have come, each gets its answer. Lanes that come to different functions, or of which some have ended, would hang or
// read nonsense on a GPU: here they end the process and say so.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <ucontext.h>

#define DEVICE inline

namespace emulated {

enum class Meeting { none, ballot, broadcast, from_below, alike, barrier };

struct Warp {
    static constexpr std::size_t STACK_BYTES = 128 << 10;

    std::unique_ptr<char[]> stacks{new char[WARP * STACK_BYTES]};
    std::jmp_buf scheduler, lanes[WARP];
    ucontext_t caller, starts[WARP];
    bool has_started[WARP], has_ended[WARP];
    u32 current = 0;
    // What each lane came with, and where.
    Meeting meeting[WARP];
    u32 values[WARP], arguments[WARP], answers[WARP];
    void (*body)(void*) = nullptr;
    void* argument = nullptr;

    static Warp*& of_thread() {
        static thread_local Warp* warp = nullptr;
        return warp;
    }

    // _setjmp and _longjmp: unlike swapcontext they make no system call.
    __attribute__((noinline)) static void switch_from(std::jmp_buf& from, std::jmp_buf& to) {
        if (_setjmp(from) == 0) _longjmp(to, 1);
    }

    static void start() {
        Warp& warp = *of_thread();
        warp.body(warp.argument);
        warp.has_ended[warp.current] = true;
        warp.meeting[warp.current] = Meeting::none;
        _longjmp(warp.scheduler, 1);
    }

    // Runs one lane to its next meeting or its end.
    __attribute__((noinline)) void run_lane(u32 number) {
        current = number;
        if (has_started[number]) {
            switch_from(scheduler, lanes[number]);
            return;
        }
        has_started[number] = true;
        getcontext(&starts[number]);
        starts[number].uc_stack.ss_sp = stacks.get() + number * STACK_BYTES;
        starts[number].uc_stack.ss_size = STACK_BYTES;
        starts[number].uc_link = nullptr;
        makecontext(&starts[number], start, 0);
        if (_setjmp(scheduler) == 0) setcontext(&starts[number]);
    }

    void run(void (*of_lane)(void*), void* with) {
        body = of_lane, argument = with;
        for (u32 number = 0; number < WARP; number++) has_started[number] = has_ended[number] = false;
        while (true) {
            for (u32 number = 0; number < WARP; number++) run_lane(number);
            for (u32 number = 1; number < WARP; number++) {
                if (meeting[number] != meeting[0] || has_ended[number] != has_ended[0]) {
                    std::fprintf(stderr, "lanes 0 and %u of a warp came to different places\n", number);
                    std::abort();
                }
            }
            if (has_ended[0]) return;
            answer();
        }
    }

    void answer() {
        u32 votes = 0;
        for (u32 number = 0; number < WARP; number++) votes |= u32(values[number] != 0) << number;
        for (u32 number = 0; number < WARP; number++) {
            u32 alike = 0;
            switch (meeting[number]) {
                case Meeting::ballot: answers[number] = votes; break;
                case Meeting::broadcast: answers[number] = values[arguments[number] % WARP]; break;
                case Meeting::from_below:
                    answers[number] = values[number < arguments[number] ? number : number - arguments[number]];
                    break;
                case Meeting::alike:
                    for (u32 other = 0; other < WARP; other++) alike |= u32(values[other] == values[number]) << other;
                    answers[number] = alike;
                    break;
                default: break;
            }
        }
    }

    // Called by a lane: comes to a meeting and goes on when all have.
    u32 come(Meeting to, u32 value, u32 with) {
        const u32 self = current;
        meeting[self] = to, values[self] = value, arguments[self] = with;
        switch_from(lanes[self], scheduler);
        return answers[self];
    }
};

} // namespace emulated

DEVICE u32 lane() { return emulated::Warp::of_thread()->current; }
DEVICE u32 ballot(bool vote) { return emulated::Warp::of_thread()->come(emulated::Meeting::ballot, vote, 0); }
DEVICE u32 broadcast(u32 value, u32 from) {
    return emulated::Warp::of_thread()->come(emulated::Meeting::broadcast, value, from);
}
DEVICE u32 from_below(u32 value, u32 distance) {
    return emulated::Warp::of_thread()->come(emulated::Meeting::from_below, value, distance);
}
DEVICE u32 lanes_alike(u32 value) { return emulated::Warp::of_thread()->come(emulated::Meeting::alike, value, 0); }
DEVICE void meet() { emulated::Warp::of_thread()->come(emulated::Meeting::barrier, 0, 0); }

// Compiled with -ffp-contract=off, for a CPU whose float is binary32.
DEVICE float multiply(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
