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
	done chan struct{} // closed when it has ended
}

// startProcess starts the command. A goroutine waits for its end, on the
// thread that started it: that thread must live as long as the child (see
// dieWithParent).
func startProcess(path string, args []string, dir string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Dir = dir
	p.cmd.SysProcAttr = dieWithParent()
	started := make(chan error, 1)
	go func() { // ends with the child, which kill waits for
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended does not matter: most are killed
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("redistest: start %s: %w", path, err)
	}
	return p, nil
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

// signal sends it a signal and waits for its end. os.Kill ends it even if it
// is paused.
func (p *process) signal(s os.Signal) {
	_ = p.cmd.Process.Signal(s) // fails only if it has ended
	<-p.done
}
