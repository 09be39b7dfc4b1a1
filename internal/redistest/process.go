package redistest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
)

// process is one running server. Its fields do not change.
type process struct {
	cmd  *exec.Cmd
	done <-chan struct{} // closed when it has ended
}

// startProcess starts the command.
func startProcess(path string, args []string, dir string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...)}
	p.cmd.Dir = dir
	var err error
	if p.done, err = StartTied(p.cmd); err != nil {
		return nil, fmt.Errorf("redistest: start %s: %w", path, err)
	}
	return p, nil
}

// StartTied starts a command that dies with this process, if the system offers that. It
// dies even if it is paused, and however this process ends. A goroutine waits for its
// end, on the thread that started it, because that thread must live as long as the child
// (see dieWithParent). The channel is closed when the command has ended and
// Cmd.ProcessState is set. The caller must end the command, and must not call Cmd.Wait.
func StartTied(cmd *exec.Cmd) (ended <-chan struct{}, err error) {
	cmd.SysProcAttr = dieWithParent()
	started, done := make(chan error, 1), make(chan struct{})
	go func() { // ends with the child
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // the result is in ProcessState
		}
	}()
	return done, <-started
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// signal sends a signal and waits for the end of the process. os.Kill also ends a paused
// process.
func (p *process) signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // fails only if it has ended
	<-p.done
}
