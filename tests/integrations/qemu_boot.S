/* SPDX-License-Identifier: MIT */
/*
 * A boot sector for test_qemu_plugin.py, which knows what it stores: with paging, so that two
 * pages which follow each other are far apart in RAM.  It ends QEMU by its isa-debug-exit.
 */
        .code16
start:  cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl table
        movl %cr0, %eax
        orl $1, %eax
        movl %eax, %cr0
        ljmpl $8, $flat

        .code32
flat:   movw $16, %ax
        movw %ax, %ds
        movw %ax, %es
        movl $0x7000, %esp
        /* At 0x10000 a directory: the first 128 MiB as they are, and one table at 0x11000. */
        movl $0x10000, %edi
        movl $0x83, %eax
        movl $32, %ecx
1:      movl %eax, (%edi)
        addl $4, %edi
        addl $0x400000, %eax
        loop 1b
        movl $0x11003, 0x10400          /* 0x40000000 */
        movl $0x2300003, 0x11000
        movl $0x2200003, 0x11004
        movl %cr4, %eax
        orl $0x10, %eax                 /* pages of 4 MiB */
        movl %eax, %cr4
        movl $0x10000, %eax
        movl %eax, %cr3
        movl %cr0, %eax
        orl $0x80000000, %eax
        movl %eax, %cr0

        movb $1, 0x2000000
        movl $1, 0x2005ffe              /* and the next */
        movl $-1, 0x40000ffe            /* 0x2300000 and 0x2200000 */
        lock incl 0x2400000
        movl $0x2500ff0, %edi           /* and the next */
        movl $8, %ecx
        movl $7, %eax
        rep stosl
        movl 0x2600000, %eax            /* read only */
        cmpb $0, go_on
        jne .
        movl $0, %eax
        outl %eax, $0xf4
1:      jmp 1b

        .align 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
table:  .word 23
        .long gdt
go_on:  .byte 0
        .org 510
        .word 0xaa55
