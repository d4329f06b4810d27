package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// cpuTime is what a process has used so far, in user and kernel mode, all threads. It comes in steps of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, and may hold spaces itself.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("the statistics of process %d cannot be read: %q", pid, data)
	}
	utime, err1 := strconv.Atoi(fields[11])
	stime, err2 := strconv.Atoi(fields[12])
	return time.Duration(utime+stime) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// resident is the memory that a process holds, in MiB: all of it, and with only its share of what others hold as well.
func resident(pid int) (rss, pss float64, err error) {
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	rss, err1 := kilobytes(path, "Rss:")
	pss, err2 := kilobytes(path, "Pss:")
	return rss / 1024, pss / 1024, errors.Join(err1, err2)
}

// peak is the most memory that a process held so far, in MiB.
func peak(pid int) (float64, error) {
	kb, err := kilobytes(fmt.Sprintf("/proc/%d/status", pid), "VmHWM:")
	return kb / 1024, err
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

// load is the machine's load averages.
func load() string {
	data, err := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(data))
	if err != nil || len(f) < 3 {
		return "unknown"
	}
	return strings.Join(f[:3], " ")
}
