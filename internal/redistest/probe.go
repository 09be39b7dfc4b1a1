package redistest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

const (
	startTimeout  = 20 * time.Second // on a loaded machine, under -race
	probeTimeout  = 2 * time.Second
	probeInterval = 2 * time.Millisecond
)

// errEnded says that a server ended by itself, most likely because another process uses
// its port.
var errEnded = errors.New("redistest: server ended")

// answers waits until this process answers and has loaded its data.
func (s *Server) answers(proc *process) error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := probe(s.Addr(), proc.pid())
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("redistest: no answer within %v: %w", startTimeout, err)
		}
		select {
		case <-proc.done:
			return errEnded
		case <-time.After(probeInterval):
		}
	}
}

// probe checks once that the process answers. It uses no client, because a client would
// retry and log each refusal.
func probe(addr string, pid int) (err error) {
	conn, err := net.DialTimeout("tcp", addr, probeTimeout)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetDeadline(time.Now().Add(probeTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("INFO\r\n")); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	head, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if strings.HasPrefix(head, "-NOAUTH") || strings.HasPrefix(head, "-ERR unknown command") { // a password is required, or there is no INFO
		return nil
	}
	size, err := strconv.Atoi(strings.Trim(head, "$\r\n"))
	if err != nil || size < 0 {
		return fmt.Errorf("redistest: answer to INFO: %q", head)
	}
	info := make([]byte, size)
	if _, err := io.ReadFull(r, info); err != nil {
		return err
	}
	if want := fmt.Sprintf("process_id:%d\r\n", pid); !strings.Contains(string(info), want) {
		return fmt.Errorf("redistest: INFO does not say %q", want)
	}
	if still := "\nloading:1\r\n"; strings.Contains(string(info), still) { // a sentinel does not report it
		return fmt.Errorf("redistest: INFO says %q", still)
	}
	return nil
}
