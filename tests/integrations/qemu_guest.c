/* SPDX-License-Identifier: MIT */
/*
 * What test_qemu_plugin.py runs under user-mode QEMU: stores of many kinds in a buffer of
 * PAGES pages, of which it then says what it has changed.
 *
 *     qemu_guest stores|threads|fork|signal|forever|zeros|sve
 *
 * Prints the buffer's address, then a line with a character for each page: 1, changed.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 4096, THREADS = 4 };

static unsigned char *buffer;

static void say(void)
{
    printf("%p\n", (void *)buffer);
    for (unsigned page = 0; page < PAGES; page++) {
        char changed = '0';

        for (unsigned i = 0; i < PAGE; i++) {
            if (buffer[page * PAGE + i]) {
                changed = '1';
            }
        }
        putchar(changed);
    }
    putchar('\n');
    fflush(stdout);
}

static void kinds(void)
{
    struct { uint64_t a, b; } pair = { UINT64_MAX, UINT64_MAX };
    uint64_t all = UINT64_MAX;
    uint16_t two = 0xffff;

    buffer[0] = 1;
    buffer[3 * PAGE - 1] = 1;
    memcpy(buffer + 6 * PAGE - 1, &two, 2);             /* over the end of a page */
    memcpy(buffer + 9 * PAGE - 4, &all, 8);
    memcpy(buffer + 12 * PAGE - 8, &pair, 16);
    memset(buffer + 15 * PAGE + 1, 1, 2 * PAGE);        /* 15, 16, 17 */
    atomic_fetch_add((_Atomic uint32_t *)(void *)(buffer + 20 * PAGE), 1);
    {
        uint64_t zero = 0;

        atomic_compare_exchange_strong((_Atomic uint64_t *)(void *)(buffer + 22 * PAGE), &zero, 5);
    }
    atomic_exchange((_Atomic uint8_t *)(buffer + 24 * PAGE), 7);
#ifdef __x86_64__
    {
        void *to = buffer + 26 * PAGE + 4000;           /* 26, 27 */
        size_t count = 100;

        __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(1) : "memory");
        __asm__ volatile("movdqu %0, (%1)" : : "x"((__uint128_t)-1),
                         "r"(buffer + 30 * PAGE - 8) : "memory");
        __asm__ volatile("fxsave (%0)" : : "r"(buffer + 32 * PAGE) : "memory");
    }
#endif
}

static void *some_pages(void *argument)
{
    unsigned first = (unsigned)(uintptr_t)argument;

    for (unsigned i = first; i < PAGES; i += THREADS) {
        if (i * 2654435761u >> 31) {
            buffer[(size_t)i * PAGE + i % PAGE] = 1;
        }
    }
    return NULL;
}

static void threads(void)
{
    pthread_t thread[THREADS];

    for (unsigned i = 0; i < THREADS; i++) {
        pthread_create(&thread[i], NULL, some_pages, (void *)(uintptr_t)i);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(thread[i], NULL);
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "stores";

    buffer = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) {
        return 1;
    }
    if (strcmp(what, "threads") == 0) {
        threads();
#ifdef __aarch64__
    } else if (strcmp(what, "zeros") == 0) {
        for (unsigned at = 0; at < 4 * PAGE; at += 64) {
            __asm__ volatile("dc zva, %0" : : "r"(buffer + at) : "memory");
        }
    } else if (strcmp(what, "sve") == 0) {
        __asm__ volatile(".arch armv8.2-a+sve\n"
                         "ptrue p0.b\n"
                         "st1b z0.b, p0, [%0]" : : "r"(buffer) : "memory");
#endif
    } else {
        kinds();
    }
    if (strcmp(what, "fork") == 0) {
        pid_t child;

        say();
        child = fork();
        if (child == 0) {
            memset(buffer, 1, (size_t)PAGES * PAGE);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        buffer[(PAGES - 1) * PAGE] = 1;
    }
    say();
    if (strcmp(what, "signal") == 0) {
        raise(SIGSEGV);
    }
    if (strcmp(what, "forever") == 0) {
        for (volatile uint64_t i = 0;; i++) {
        }
    }
    return 0;
}
