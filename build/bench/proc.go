package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of times in /proc, the same on all of Linux's common architectures.
const tick = 10 * time.Millisecond

// cpuTime is what a process has used so far, in user and kernel mode, all threads.
func cpuTime(pid int) (time.Duration, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, with whatever is in it.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("%s has %d fields", path, len(fields))
	}
	var sum time.Duration
	for _, f := range fields[11:13] { // utime, stime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

// resident is the memory that a process holds, in MiB: all of it, and with its share of what it has in common with others.
func resident(pid int) (rss, pss float64, err error) {
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	if rss, err = kilobytes(path, "Rss:"); err != nil {
		return 0, 0, err
	}
	if pss, err = kilobytes(path, "Pss:"); err != nil {
		return 0, 0, err
	}
	return rss / 1024, pss / 1024, nil
}

// kilobytes reads a line such as "Rss:  12345 kB".
func kilobytes(path, key string) (float64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(data)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == key {
			return strconv.ParseFloat(f[1], 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, key)
}

// memory of the machine in MiB, 0 when it is not known.
func memory() float64 {
	kb, err := kilobytes("/proc/meminfo", "MemTotal:")
	if err != nil {
		return 0
	}
	return kb / 1024
}

// load is the machine's load averages.
func load() string {
	data, err := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(data))
	if err != nil || len(f) < 3 {
		return "unknown"
	}
	return strings.Join(f[:3], " ")
}
