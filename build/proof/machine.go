package proof

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Machine watches who uses the CPUs, so that a slow answer can be told from a machine that does something else. It reads
// Linux' /proc; elsewhere nobody else is ever seen.
type Machine struct {
	stop  context.CancelFunc
	ended chan struct{}

	mu    sync.Mutex
	ours  map[int]struct{}
	looks []look
}

// look is what was used of all CPUs since boot, in ticks.
type look struct {
	at                 time.Time
	total, idle, taken uint64 // taken by our own processes
}

// lookEvery is long enough for some dozens of ticks.
const lookEvery = 250 * time.Millisecond

// WatchMachine begins to watch; Stop must be called. This process and those of the ids count as one's own, and Own adds
// more.
func WatchMachine(ctx context.Context, pids ...int) *Machine {
	ctx, stop := context.WithCancel(ctx)
	m := &Machine{stop: stop, ended: make(chan struct{}), ours: map[int]struct{}{os.Getpid(): {}}}
	m.Own(pids...)
	go func() {
		defer close(m.ended)
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			m.look()
			select {
			case <-tick.C:
			case <-ctx.Done():
				m.look()
				return
			}
		}
	}()
	return m
}

// Own adds processes of one's own.
func (m *Machine) Own(pids ...int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range pids {
		m.ours[p] = struct{}{}
	}
}

// Stop ends the watch. What was seen can still be asked for.
func (m *Machine) Stop() {
	m.stop()
	<-m.ended
}

func (m *Machine) look() {
	total, idle, err := allTicks()
	if err != nil {
		return // no Linux
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	l := look{at: time.Now(), total: total, idle: idle}
	for p := range m.ours {
		l.taken += ticksOf(p)
	}
	m.looks = append(m.looks, l)
}

// Others is the share (0 to 1) of all CPUs that other programs, and other guests of the host, had from one moment to
// another.
func (m *Machine) Others(from, to time.Time) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.looks) == 0 {
		return 0
	}
	first, last := m.looks[0], m.looks[len(m.looks)-1]
	for _, l := range m.looks {
		if !l.at.After(from) {
			first = l
		}
		if !l.at.Before(to) {
			last = l
			break
		}
	}
	if last.total <= first.total {
		return 0
	}
	total := float64(last.total - first.total)
	used := total - (float64(last.idle) - float64(first.idle)) - (float64(last.taken) - float64(first.taken))
	return min(1, max(0, used/total))
}

// allTicks reads the machine's first line of /proc/stat: user nice system idle iowait irq softirq steal.
func allTicks() (total, idle uint64, err error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Scan()
	fields := strings.Fields(lines.Text())
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, 0, fmt.Errorf("/proc/stat begins with %q", lines.Text())
	}
	for i, f := range fields[1:9] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		total += n
		if i == 3 || i == 4 {
			idle += n
		}
	}
	return total, idle, nil
}

// ticksOf is what a process has used, 0 when it is gone.
func ticksOf(pid int) uint64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything; the 12th and 13th field behind it are user and system time.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseUint(fields[11], 10, 64)
	system, _ := strconv.ParseUint(fields[12], 10, 64)
	return user + system
}
